"""Settings as YAML: one file for a run here, one for each model under `model/`."""
