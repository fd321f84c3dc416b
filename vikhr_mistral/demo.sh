#!/usr/bin/env bash
# The road from Mistral to a chat model in small, on a CPU: each line is a command that you can run by itself.
# Interrupt it anywhere and run it again: finished steps are recognised, training goes on where it stopped.
set -euo pipefail
RUNS=runs/demo-mistral
DATA=$(python -c "import tasks, pathlib; print(pathlib.Path(tasks.__file__).parent / 'demo_data')")

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() { printf '\033[2m$ %s\033[0m\n' "$*"; "$@"; }

say "1/7  A small Mistral with random weights and Mistral's tokenizer; the embedded pages"
if [ ! -d "$RUNS/base" ]; then
  run python -m vikhr_mistral.demo "$DATA" "$RUNS"
fi

say "2/7  Tokenizer: Cyrillic pieces for Mistral's vocabulary"
if [ ! -d "$RUNS/tokenizer" ]; then
  run vikhr-mistral tokenizer --base "$RUNS/base" --corpus "$RUNS/data/russian.txt" \
    --donor_size 20000 --size 40000 --output "$RUNS/tokenizer"
fi

say "3/7  Their rows in both embedding matrices: means of the old pieces"
if [ ! -d "$RUNS/start" ]; then
  run vikhr-mistral init --base "$RUNS/base" --tokenizer "$RUNS/tokenizer" --output "$RUNS/start" --verify
fi

say "4/7  Pre-training on Russian, with some English"
run vikhr-mistral pretrain --config demo_pretrain

say "5/7  Chats: the loss counts the bot's turns"
run vikhr-mistral instruct --config demo_instruct

say "6/7  Adapter and base in one, and a question to it"
run vikhr-mistral merge "$RUNS/instruct/model" "$RUNS/merged"
QUESTION="Как это сказать по-русски? Select the file."
printf '\033[2m$ echo "%s" | vikhr-mistral chat %s\033[0m\n' "$QUESTION" "$RUNS/merged"
echo "$QUESTION" | vikhr-mistral chat "$RUNS/merged" --max_new_tokens 40 --seed 0

say "7/7  Report"
run vikhr-t5 report "$RUNS/pretrain" "$RUNS/instruct" --output "$RUNS/report.html"

say "Done. The model: $RUNS/merged (transformers loads it). The reports: $RUNS/report.html, $RUNS/tokenizer/fertility.html"
