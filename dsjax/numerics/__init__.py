"""Number formats: what a weight or an activation is between its bits and its value."""
