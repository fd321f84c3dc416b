#!/usr/bin/env bash
# The main job, on the embedded corpus: each line is a command that you can run by itself.
# Interrupt it anywhere and run it again: finished steps are recognised, training goes on where it stopped.
set -euo pipefail
RUNS=${RUNS:-runs/demo}
DATA=$(python -c "import tasks, pathlib; print(pathlib.Path(tasks.__file__).parent / 'demo_data')")

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() { printf '\033[2m$ %s\033[0m\n' "$*"; "$@"; }

say "1/5  Vocabulary: 8,192 pieces from the Russian and English help"
if [ ! -f "$RUNS/vocabulary/spiece.model" ]; then
  run vikhr-t5 vocab train --input "$DATA/ru.txt,$DATA/en.txt" --output "$RUNS/vocabulary/spiece.model" --size 7892
fi

say "2/5  Pre-training: UL2's mixture of denoisers on Russian text"
run vikhr-t5 train --gin_file=recipes/demo.gin \
  --gin.MODEL_DIR="'$RUNS/ul2'" --gin.VOCABULARY_FILE="'$RUNS/vocabulary/spiece.model'" --gin.CACHE_DIR="'$RUNS/cache'"

say "3/5  Instructions: translate both ways, complete, restore"
run vikhr-t5 train --gin_file=recipes/demo_finetune.gin \
  --gin.MODEL_DIR="'$RUNS/instruct'" --gin.INITIAL_CHECKPOINT_PATH="'$RUNS/ul2'" \
  --gin.VOCABULARY_FILE="'$RUNS/vocabulary/spiece.model'" --gin.CACHE_DIR="'$RUNS/cache'"

say "4/5  Hugging Face: convert, compare logits, generate the same tokens with transformers"
run vikhr-t5 convert --from vikhr --to hf "$RUNS/instruct" "$RUNS/hf" --verify

say "5/5  Report"
run vikhr-t5 report "$RUNS/ul2" "$RUNS/instruct" --output "$RUNS/report.html"

say "Done. The model: $RUNS/hf (transformers loads it). The report: $RUNS/report.html"
