#!/bin/bash
right=0
[ "$(tr -dc 0-9 < /app/count.txt 2>/dev/null)" = 3 ] && right=1
written=0
[ -f /app/count.txt ] && written=1
echo "{\"reward\": $(python3 -c "print(0.5 * $written + 0.5 * $right)"), \"written\": $written, \"right\": $right}" > /logs/verifier/reward.json
