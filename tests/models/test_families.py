import pytest
import torch
from families import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_images_words_and_padding_fit_the_model(name):
    family = FAMILIES[name]()
    plain = family.inputs(batch=2, seed=1, before=(2, 4), padding_side="left")
    logits = family.model(**plain).logits
    assert logits.isfinite().all()
    right = family.inputs(batch=2, seed=1, before=(2, 4), padding_side="right")
    length = int(right["attention_mask"][0].sum())
    torch.testing.assert_close(
        family.model(**right).logits[0, :length], logits[0, -length:], rtol=1e-4, atol=1e-4
    )
    if family.image_tokens:
        other = plain | {"pixel_values": plain["pixel_values"].flip(-1) * 2}
        assert (family.model(**other).logits[:, -1] - logits[:, -1]).abs().max() > 1e-2
        family.model(**family.inputs(batch=2, images=2))
