"""SpikeNoMore under real Composer trainers. Composer is imported where it is used: not every environment has it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same, composer_trainer, weights, windows
from torch import Tensor, nn

from msign_lightning import spike_no_more_
from msign_lightning.recipes.transformer import Transformer, TransformerConfig

pytestmark = pytest.mark.composer

CONFIG = TransformerConfig(vocab_size=96, n_layers=2, width=32, mlp_width=48)
SEED = 7


def make_model(seed: int = 0) -> nn.Module:
    from msign_lightning.recipes.composer_train import ComposerLanguageModel

    torch.manual_seed(seed)
    return ComposerLanguageModel(Transformer(CONFIG))


def make_trainer(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, algorithms: Any = None, **arguments):
    from torch.utils.data import DataLoader

    from msign_lightning.algorithms import SpikeNoMore

    loader = windows(6)
    defaults: dict[str, Any] = {
        "train_dataloader": DataLoader(torch.cat([loader.batch(i) for i in range(6)]), batch_size=4),
        "max_duration": "6ba",
        "optimizers": optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2),
        "algorithms": [SpikeNoMore("embed_ln")] if algorithms is None else algorithms,
        "seed": SEED,
    }
    return composer_trainer(model, **(defaults | arguments))


def test_prepares_where_the_trainer_begins_whatever_the_generator():
    by_hand = make_model()
    torch.manual_seed(SEED)
    spike_no_more_(by_hand, "embed_ln")
    for seed in (0, 1):
        model = make_model(seed)
        make_trainer(model).close()
        assert_same(weights(model), weights(by_hand))
    std = model.transformer.blocks[0].mlp.up_proj.weight.std().item()
    assert std == pytest.approx(math.sqrt(2 / (5 * CONFIG.width)), rel=0.1)


def test_new_norm_is_trained_with_the_other_gains():
    model = make_model()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": gains, "weight_decay": 0.0}], lr=1e-2)
    trainer = make_trainer(model, optimizer)
    norm = model.transformer.embedding.norm
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == {id(p) for p in (*gains, *norm.parameters())}
    assert len(optimizer.param_groups[0]["params"]) == len(matrices)
    trainer.fit()
    assert norm.weight.ne(1).all()
    assert norm.bias.ne(0).all()
    trainer.close()


def test_function_adds_the_norm_to_an_optimizer_once():
    from msign_lightning.algorithms import apply_spike_no_more

    model = make_model()
    embedding = model.transformer.embedding
    optimizer = torch.optim.SGD([embedding.weight], lr=0.1)
    for _ in range(2):
        apply_spike_no_more(model, "embed_ln", optimizers=optimizer)
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in embedding.parameters()]


@pytest.mark.parametrize("shortcut", ["scaled_embed", "embed_ln"])
def test_resumed_run_ends_bit_equal(tmp_path, shortcut):
    from msign_lightning.algorithms import MSign, SpikeNoMore

    def fit(folder: str, **arguments: Any) -> dict[str, Tensor]:
        model = make_model()
        algorithms = [SpikeNoMore(shortcut), MSign(period=4)]
        save = {"save_folder": str(tmp_path / folder), "save_interval": "3ba", "save_filename": "{batch}.pt"}
        trainer = make_trainer(model, algorithms=algorithms, **save, **arguments)
        trainer.fit()
        trainer.close()
        return weights(model)

    whole = fit("whole")
    assert_same(fit("resumed", load_path=str(tmp_path / "whole" / "3.pt")), whole)


def test_trained_weights_are_not_drawn_anew():
    from msign_lightning.algorithms import SpikeNoMore

    model = make_model()
    trainer = make_trainer(model)
    trainer.fit()
    trainer.close()
    trained = weights(model)
    make_trainer(model).close()  # another trainer
    assert_same(weights(model), trained)

    loaded = make_model()
    loaded.load_state_dict(trained, strict=False)
    make_trainer(loaded, algorithms=[SpikeNoMore(init=False)]).close()
    assert torch.equal(loaded.transformer.embedding.weight, trained["transformer.embedding.weight"])
    x = loaded.transformer.embedding(torch.arange(96))
    torch.testing.assert_close(x, math.sqrt(CONFIG.width) * loaded.transformer.embedding.weight)


def test_logs_how_many_matrices():
    from composer.loggers import InMemoryLogger

    logger = InMemoryLogger()
    make_trainer(make_model(), loggers=[logger]).close()
    assert logger.hyperparameters["spike_no_more/matrices"] == 12


def test_same_errors_as_the_callback():
    from msign_lightning.algorithms import SpikeNoMore

    with pytest.raises(ValueError, match="shortcut must be one of"):
        SpikeNoMore("embed_detach")
    model = make_model()
    model.transformer.second = nn.Embedding(3, 4)
    with pytest.raises(ValueError, match="pass embedding=<name of its module>"):
        make_trainer(model)


def test_repr_and_metadata():
    from msign_lightning import algorithms
    from msign_lightning.algorithms import SpikeNoMore

    algorithm = SpikeNoMore("embed_ln", init=False, outputs=["*.o_proj.weight"])
    assert repr(eval(repr(algorithm))) == repr(algorithm)
    metadata = json.loads((Path(algorithms.__file__).parent / "spike_no_more" / "metadata.json").read_text())
    assert getattr(algorithms, metadata["spike_no_more"]["class_name"]) is SpikeNoMore
    assert hasattr(algorithms, metadata["spike_no_more"]["functional"])
