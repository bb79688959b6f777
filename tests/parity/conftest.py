"""What the parity tests share. Without torch and transformers they are skipped, and say so."""

import types

import pytest


@pytest.fixture(scope="session")
def live() -> types.ModuleType:
    """The module `parity.live`: transformers as the oracle. Versions before 5.23 lack YaRN's softmax scale."""
    pytest.importorskip("torch", reason="needs the parity extra")
    pytest.importorskip("transformers", minversion="5.23", reason="needs the parity extra")
    import transformers
    from parity import live

    transformers.utils.logging.disable_progress_bar()
    return live
