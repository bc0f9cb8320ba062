#!/bin/sh
# A chat, whole and as a stream.
set -eu
url=${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}
ask() {
    curl --silent --show-error --fail-with-body --no-buffer "$url/chat/completions" \
        --header 'Content-Type: application/json' \
        --header "Authorization: Bearer ${OPENAI_API_KEY:-none}" --data "$1"
    echo
}
ask '{"messages": [{"role": "user", "content": "What is 12 + 30?"}], "temperature": 0}'
ask '{"messages": [{"role": "user", "content": "What is 12 + 30?"}], "temperature": 0, "stream": true}'
