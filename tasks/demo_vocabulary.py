"""The demo's vocabulary, trained on the embedded corpus at first use. No TensorFlow: the trainer imports this."""

import sys
from pathlib import Path

from vikhr_t5.data.vocabulary import Vocabulary, train_vocabulary

DATA = Path(__file__).parent / "demo_data"


def vocabulary(sentencepiece_model_file: str, extra_ids: int = 300, size: int = 7892) -> Vocabulary:
    """The vocabulary of that file; where it is missing, `size` pieces are trained from the embedded texts first."""
    if not Path(sentencepiece_model_file).exists():
        print(f"{sentencepiece_model_file} is missing: training {size} pieces on the embedded texts", file=sys.stderr)
        train_vocabulary([DATA / "ru.txt", DATA / "en.txt"], sentencepiece_model_file, size)
    return Vocabulary(sentencepiece_model_file, extra_ids)
