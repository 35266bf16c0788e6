"""Steps and tables as hypothesis draws them."""

from __future__ import annotations

from hypothesis import strategies as st

from vllm_saguaro.messages import Admit, Noise, Outcome, Release, Sampling, Stamp, Step, Want

INT32 = 2**31 - 1
counts = st.integers(0, INT32)
token_ids = st.lists(counts, max_size=20).map(tuple)
stamps = st.builds(Stamp, counts, counts, st.integers(0, 2**63 - 1))
fractions = st.floats(0, 1, width=32)
samplings = st.builds(
    Sampling,
    temperature=st.floats(0, 1e6, width=32),
    top_k=counts,
    top_p=fractions,
    min_p=fractions,
    noise=st.sampled_from(Noise),
    seed=st.integers(-(2**63), 2**63 - 1),
    prompt_length=counts,
)
admits = st.builds(Admit, stamps, samplings, token_ids)
wants = st.builds(Want, stamps, counts, counts, counts)


@st.composite
def outcomes(draw: st.DrawFn) -> Outcome:
    """No more accepted than were verified."""
    verified = draw(counts)
    accepted = draw(st.integers(0, verified))
    return Outcome(draw(stamps), accepted, draw(counts), draw(counts), draw(token_ids), verified)


steps = st.builds(
    Step,
    st.lists(admits, max_size=4),
    st.lists(wants, max_size=4),
    st.lists(outcomes(), max_size=4),
    st.lists(st.builds(Release, stamps), max_size=4),
)
