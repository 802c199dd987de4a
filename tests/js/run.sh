#!/bin/sh
# The official JavaScript client against a running server: run.sh http://127.0.0.1:8080
# Fetches the newest @fal-ai/client from npm into a folder of its own.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp "$here/client.mjs" "$folder"
cd "$folder"
npm install --silent --no-audit --no-fund --no-save "@fal-ai/client@${FAL_CLIENT_VERSION:-latest}"
node client.mjs "$1"
