#!/bin/sh
# Prints the .html files here to .png files with a headless Chromium (Debian: apt install chromium fonts-open-sans).
set -eu
cd "$(dirname "$0")"
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
for page in ${*:-receipt ticket prices letter}; do
  "${CHROMIUM:-chromium}" --headless --no-sandbox --disable-gpu --disable-quic --no-first-run \
    --disable-background-networking --disable-component-update --disable-sync --user-data-dir="$profile" \
    --hide-scrollbars --window-size=640,640 --screenshot="$PWD/$page.png" "file://$PWD/$page.html"
done
