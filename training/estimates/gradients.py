"""Which gradients the backward pass of a UNet needs, by what is trained in it."""

from collections.abc import Mapping

from training.models.trainable import Trained


def input_gradients(trained: Mapping[str, Trained], *, text: bool, pooled: bool) -> dict[str, bool]:
    """Whether the backward pass needs the gradient of each layer's input: anything that is trained
    comes before it.

    Args:
        trained: What is trained at each layer of a UNet, by name, in the order of its forward pass.
        text: Whether the gradient of the text is needed.
        pooled: Whether that of the pooled text is.
    """
    embedded = {"time_embedding": False, "add_embedding": pooled}
    image, found = False, {}
    for name, here in trained.items():
        branch = name.partition(".")[0]
        if branch in embedded:
            found[name] = embedded[branch]
            embedded[branch] |= bool(here)
            continue
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            found[name] = text
        else:
            found[name] = any(embedded.values()) if name.endswith("time_emb_proj") else image
        image |= found[name] or bool(here)
    return found


def attention_products(
    query: str, trained: Mapping[str, Trained], needed: Mapping[str, bool]
) -> int:
    """Products of an attention's backward pass; the forward pass has two.

    Args:
        query: Name of its `to_q`.
        trained: As in `input_gradients`.
        needed: From `input_gradients`.
    """
    attention = query.removesuffix("to_q")
    q, k, v = (
        needed[f"{attention}{name}"] or bool(trained[f"{attention}{name}"])
        for name in ("to_q", "to_k", "to_v")
    )
    return q + k + (q or k) + v
