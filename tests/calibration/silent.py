"""A model in which nothing has an effect until a test gives it weights."""

from tests.tiny_models import tiny_model


def silent_model():
    """A model without rotation whose attention reads all keys alike and adds nothing to its output."""
    model = tiny_model(vocab_size=512, max_position_embeddings=1024, rope_parameters=None)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    # Without rotation, the same token gives the same key wherever it stands.
    model.model.rotary_emb.inv_freq.zero_()
    return model
