"""The mixtures of the two recipes; importing this registers the corpora's and FLAN's tasks, too.

    vikhr_ul2        pre-training: Wikipedia .25, Habr .25, RULM .40, news .10
    vikhr_flan       instructions (`tasks.flan`)
    vikhr_flan_ul2   instructions .90, and the denoising of vikhr_ul2 .10, so that it is not forgotten

Rates are shares of examples; a window of text that is denoised counts as one, as it does in seqio. They are fixed ones:
sizes count documents, which a news item is as much as an article of Wikipedia. RULM has older copies of Wikipedia, Habr
and news in it, so these are seen more often than their rates say; darulm is made of RULM and libru, and left out.
"""

import seqio

from tasks import corpora, flan

__all__ = ["corpora", "flan"]

DENOISED = 0.10  # share of the examples of vikhr_flan_ul2

seqio.MixtureRegistry.add(
    "vikhr_ul2",
    [("ru_wikipedia_ul2", 0.25), ("habr_ul2", 0.25), ("rulm_ul2", 0.40), ("ru_news_ul2", 0.10)],
)
seqio.MixtureRegistry.add("vikhr_flan_ul2", [("vikhr_flan", 1 - DENOISED), ("vikhr_ul2", DENOISED)])
