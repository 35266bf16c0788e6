"""Steps and tables as hypothesis draws them."""

from __future__ import annotations

from hypothesis import strategies as st

from vllm_saguaro.messages import Admit, Outcome, Release, Stamp, Step

INT32 = 2**31 - 1
token_ids = st.lists(st.integers(0, INT32), max_size=20).map(tuple)
stamps = st.builds(Stamp, st.integers(0, INT32), st.integers(0, INT32), st.integers(0, 2**63 - 1))
admits = st.builds(Admit, stamps, st.floats(0, 2, width=32), token_ids)
counts = st.integers(0, INT32)
outcomes = st.builds(Outcome, stamps, counts, counts, counts, token_ids)
steps = st.builds(
    Step,
    st.lists(admits, max_size=4),
    st.lists(outcomes, max_size=4),
    st.lists(st.builds(Release, stamps), max_size=4),
)
