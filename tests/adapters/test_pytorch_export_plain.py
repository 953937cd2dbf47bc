"""A grown model without Esper: the same outputs, in a process where Esper cannot be imported."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

from esper_adapters.pytorch import (
    SeededLayer,
    export_plain,
    kernel_from_function,
    kernel_from_module,
    wrap,
)
from esper_functional import BLENDS, KasminaException
from tests.adapters.kernels import torch_kernel

X = torch.tensor(np.random.default_rng(3).normal(size=(4, 3)), dtype=torch.float32)


def make_host():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2))


def load(model, name, seed, kernel, alpha):
    SeededLayer.load_kernel_sync(model.kasmina_layers[name], seed, kernel, alpha=alpha)


def shift(w, x):
    return torch.tanh(x * w)


def grown(blend="residual"):
    torch.manual_seed(1)
    model = wrap(make_host(), target_layers=[nn.Linear, nn.LayerNorm], blend=blend)
    load(model, "0", 0, kernel_from_module(nn.Linear(3, 5)), 0.3)
    load(model, "0", 1, torch_kernel(), 0.4)
    load(model, "1", 0, kernel_from_module(nn.Sequential(nn.Linear(5, 5), nn.Tanh())), 0.5)
    load(model, "1", 2, kernel_from_function(shift, {"w": torch.randn(5)}), 0.2)
    load(model, "2", 0, kernel_from_module(nn.Linear(5, 2)), 0.6)
    load(model, "2", 1, kernel_from_module(nn.Linear(5, 2)), 0.0)
    model.incubate("2", 1)
    return model


@pytest.mark.parametrize("blend", BLENDS)
def test_it_computes_the_same_trains_and_shares_nothing(blend):
    model = grown(blend)
    y = model(X)
    plain = export_plain(model)
    assert type(plain) is nn.Sequential
    torch.testing.assert_close(plain(X), y)
    assert type(plain[2]) is nn.Linear  # affine, and folded
    held = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in held for p in plain.parameters())
    plain(X).square().sum().backward()
    assert all(p.grad is not None for p in plain.parameters())
    assert not [k for k in plain.state_dict() if "esper" in k or "extra" in k]
    assert torch.equal(model(X), y)


def test_fossils_stay_frozen_and_outputs_that_are_not_finite_are_replaced():
    model = grown()
    model.fossilize("1", 0)
    root = kernel_from_function(lambda w, x: torch.sqrt(x[:, :1]) * w, {"w": torch.ones(5)})
    load(model, "1", 1, root, 0.5)
    y = model(X)
    plain = export_plain(model)
    torch.testing.assert_close(plain(X), y)
    assert plain(X).isfinite().all()
    assert [p.requires_grad for p in plain[1].grown.kernel_0.parameters()] == [False, False]


def test_layers_that_return_several_keep_their_signature():
    torch.manual_seed(0)

    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.lstm = nn.LSTM(4, 4, batch_first=True)

        def forward(self, x):
            y, weights = self.attention(x, x, value=x, need_weights=True)
            z, (h, _) = self.lstm(y)
            return z + h[0][:, None] + weights.sum()

    x = torch.randn(2, 3, 4)
    model = wrap(Host(), target_layers=[nn.MultiheadAttention, nn.LSTM])
    load(model, "attention", 0, kernel_from_module(nn.Linear(4, 4)), 0.5)
    load(model, "lstm", 0, kernel_from_module(nn.Linear(4, 4)), 0.5)
    with pytest.raises(KasminaException, match="what layer 'attention' returns: call the model"):
        export_plain(model)
    y = model(x)
    torch.testing.assert_close(export_plain(model)(x), y)


def test_it_runs_where_esper_is_not(tmp_path):
    model = wrap(make_host(), blend="residual", target_layers=[nn.Linear, nn.LayerNorm])
    load(model, "0", 1, torch_kernel(), 0.4)
    load(model, "1", 0, kernel_from_module(nn.Sequential(nn.Linear(5, 5), nn.Tanh())), 0.5)
    model.eval()
    y = model(X).detach()
    exported = torch.export.export(export_plain(model), (X,))
    torch.export.save(exported, tmp_path / "plain.pt2")
    torch.save({"x": X, "y": y}, tmp_path / "pair.pt")
    code = """
        import sys
        for name in ("esper", "esper_adapters", "esper_functional"):
            sys.modules[name] = None
        import torch
        pair = torch.load("pair.pt")
        plain = torch.export.load("plain.pt2").module()
        torch.testing.assert_close(plain(pair["x"]), pair["y"])
        print("as told")
    """
    told = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.stdout == "as told\n", told.stderr


def test_what_is_not_wrapped_or_cannot_be_traced_is_refused():
    with pytest.raises(KasminaException, match="Sequential is not a wrapped model"):
        export_plain(make_host())

    def odd(w, x):
        return x * w if bool((x > 0).any()) else x

    model = wrap(make_host(), target_layers=["1"])
    load(model, "1", 0, kernel_from_function(odd, {"w": torch.ones(5)}), 0.5)
    model(X)
    with pytest.raises(KasminaException, match=r"torch\.fx cannot trace .*kernel_from_module"):
        export_plain(model)
