#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Load the vendor's environment, then become the command.
#
# VENDOR_ENV_SCRIPTS (set by the Dockerfile): entries separated by spaces; an entry is one file, or several
# separated by ":" of which the first that exists is sourced. Docker does not run the ENTRYPOINT for
# `docker exec` and HEALTHCHECK, so those call this script themselves:
#     docker exec CONTAINER llm-adapt-entrypoint python train.py
#
# No `set -eu`: the vendors' scripts read unset variables (DTK's env.sh does). No function around `source`:
# what a vendor's script declares would end with the function.

# `source` shows a script the arguments of its caller: the set_env.sh of ATB would read the options of the
# training command as its own. So they are put aside.
llm_adapt_command=("$@")
set --

read -ra llm_adapt_entries <<< "${VENDOR_ENV_SCRIPTS:-}"
for llm_adapt_entry in "${llm_adapt_entries[@]}"; do
    IFS=: read -ra llm_adapt_files <<< "$llm_adapt_entry"
    llm_adapt_found=""
    for llm_adapt_file in "${llm_adapt_files[@]}"; do
        if [ -r "$llm_adapt_file" ]; then
            llm_adapt_found=yes
            # shellcheck disable=SC1090  # the vendor's file, known only inside the image
            source "$llm_adapt_file"
            break
        fi
    done
    if [ -z "$llm_adapt_found" ]; then
        echo "llm-adapt-entrypoint: note: this image has no ${llm_adapt_entry//:/ or }; nothing sourced for it" >&2
    fi
done

# A vendor's script may put its own folders before those of the virtual environment that holds torch.
if [ -n "${VIRTUAL_ENV:-}" ]; then
    export PATH="$VIRTUAL_ENV/bin:$PATH"
fi

if [ ${#llm_adapt_command[@]} -eq 0 ]; then
    llm_adapt_command=(bash)
fi
exec "${llm_adapt_command[@]}"
