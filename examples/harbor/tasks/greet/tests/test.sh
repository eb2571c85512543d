#!/bin/bash
# Half of the reward for any file, all of it for the right word.
reward=0
[ -f /app/greeting.txt ] && reward=0.5
grep -qxi hello /app/greeting.txt 2>/dev/null && reward=1
echo $reward > /logs/verifier/reward.txt
