#!/usr/bin/env bash
# Print settings of recipes without running them, in milliseconds each. Arguments: paths of recipes.
# For each recipe four lines: its path, MODEL_PATH, ZERO_CONFIG and its flags. `internvl train --list` reads them.

set -f # no globs in flags
.() { # replaces the builtin: a recipe ends with `. .../launch.sh`, maybe through a file of common flags
    [[ $1 == */launch.sh ]] || { builtin . "$1" && return; }
    # shellcheck disable=SC2086 # split into words, so that flags on several lines become one line
    set -- ${PACKED_FLAGS:+--use_packed_ds True} $FLAGS
    printf '%s\n' "$RECIPE" "${MODEL_PATH:-}" "${ZERO_CONFIG:-}" "$*"
}
dirname() { printf '%s' "${RECIPE%/*}"; } # of "$0", as recipes call it
basename() { local name=${RECIPE##*/} && printf '%s' "${name%.sh}"; }

for RECIPE; do
    unset MODEL_PATH ZERO_CONFIG PACKED_FLAGS FLAGS # in one shell: a fork per recipe takes twice as long
    # shellcheck source=/dev/null
    builtin . "$RECIPE"
done
