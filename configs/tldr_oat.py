"""configs/tldr.py, but pairs are picked and the ERM learns as in the authors' code, https://github.com/sail-sg/oat.

python -m sea_jax.train --config=configs/tldr_oat.py          (Pythia 1B; :2.8b and :6.9b for the larger ones)

For comparison runs. Explore and exploit is --config.exploration.rule=ee_ts_oat; IPO is on length-averaged log-ratios there:
--config.loss.name=ipo --config.loss.beta=0.2 --config.loss.length_averaged=True.
One departure is never followed: that code learns from the oracle's label also on the ERM's pairs, and counts no query for it.
Here the ERM's pairs bear the ERM's own labels, and every label of the oracle is paid for.

Expected: a win rate to hold against that of configs/tldr.py at the same queries; the anchor is too weak here to be felt.
"""

import ml_collections

from configs import tldr


def get_config(size: str = "1b") -> ml_collections.ConfigDict:
    """Returns the configuration.

    Args:
      size: as of configs/tldr.py.

    Raises:
      ValueError: there is no such size.
    """
    config = tldr.get_config(size)
    config.name = f"tldr-oat-{size}"
    config.exploration.rule = "bai_ts_oat"  # variance of logits, a head a call; paper: of preferences, a head a prompt
    config.exploration.erm_share = "fixed"  # floor(0.3 B) prompts of every batch; paper: each with probability 0.3
    config.exploration.erm_pair = "max_margin"  # the pair that a random head tells apart most; paper: the duel's own
    config.erm.anchor = "mean"  # squared distances averaged over all parameters, times the batch size; paper: summed
    config.erm.nll = "mean"  # over heads: weight decay weighs K times as much against it; paper: summed
    config.oracle.label = "deterministic"  # the preferred response wins; paper: drawn from Bradley-Terry (Sec. 3)
    return config
