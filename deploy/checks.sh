# shellcheck shell=bash
# Sourced by tpu-vm.sh and xpk.sh: errors on one line, before anything is requested.

# The caller's file, in which the first lines are the manual.
manual=$0

die() {
  echo "error: $*" >&2
  exit 2
}

needs() {
  local variable
  for variable in "$@"; do
    [[ -n "${!variable:-}" ]] || die "$variable is not set; the first lines of $manual say how"
  done
}

# refuse_placeholders CONFIG [section.key=value ...]: TPUs may come after hours in a queue; a run
# that then reads from gs://BUCKET would end at once.
refuse_placeholders() {
  local word key file
  for word in "$IMAGE" "$@"; do
    case "$word" in
      *gs://BUCKET* | *REGION-docker* | */PROJECT/*)
        die "$word: BUCKET, REGION and PROJECT stand for your own; replace them"
        ;;
    esac
  done
  file=$(dirname "${BASH_SOURCE[0]}")/../configs/$1.yaml
  [[ -f "$file" ]] || return 0
  while read -r key; do
    [[ "${*:2}" == *"$key"[=:]* ]] ||
      die "configs/$1.yaml: $key is in gs://BUCKET; give yours, section.$key=gs://..."
  done < <(sed -nE 's|^(.*[ {])?([a-z_]+): *"?gs://BUCKET.*|\2|p' "$file")
}
