"""
train.py with something that was measured and not kept; settings as of train.py. labels.py --ablate runs both.

    python bench/variants.py latent ..     a block's output shall also point where the target encoder's hidden state will: loss_latent
    python bench/variants.py shared ..     one language model is both encoder and predictor
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from configurator import Fault, configure, stop  # noqa: E402

build, adamw, language_models = train.build, train.adamw, train.language_models


class Latent(train.Grounding):
    """1 - cosine between a block's output (t, j) and the target encoder's hidden state at t+j, as BYOL (Grill et al. 2020)."""

    def forward(self, batch, tok, good):
        losses = super().forward(batch, tok, good)
        with torch.no_grad(): theirs = self.target[0](batch.obs, tok, batch.prev)       # (B, T, d)
        hidden = self.encoder(batch.obs, tok, batch.prev, batch.keep)
        out, _, _, index = self.predictor(tok, batch.prev, self.predictor.message(hidden, self.encoder, self.cut))
        rows = F.pad(theirs, (0, 0, 0, 1)).gather(1, index.flatten(1)[..., None].expand(-1, -1, theirs.shape[-1]))
        counted = train.at(index, (batch.known | good) & batch.inside)
        latent = ((1 - F.cosine_similarity(out.flatten(1, 2), rows, dim=-1)) * counted.flatten(1)).sum()
        return losses + torch.stack((torch.zeros_like(latent), latent, torch.zeros_like(latent)))


def build_latent(*args):
    train.Grounding = Latent
    model, target = build(*args)
    model.target = [target]                                                             # in a list: no part of the model
    return model, target


def share(tokenizer):
    lm, _ = language_models(tokenizer)
    return lm, lm


def adamw_once(model):
    """The groups of train.adamw; those of the predictor's language model are empty, it is the encoder's."""
    lm, model.predictor.lm = model.predictor.lm, torch.nn.Identity()
    optimizer = adamw(model)
    model.predictor.lm = lm
    return optimizer


if __name__ == "__main__":
    if sys.argv[1:2] not in (["latent"], ["shared"]): sys.exit(__doc__.strip())
    if sys.argv.pop(1) == "latent": train.build = build_latent
    else: train.language_models, train.adamw = share, adamw_once
    try: train.main(configure(vars(train)))
    except Fault as fault: stop(str(fault))
