"""The number of tokens that a call of `decode` draws, after which the host looks at the rows again.

Between two calls the device waits: the host reads what was drawn, ends rows, admits others and starts the next call.
Calls of more tokens have fewer such looks. In pages, however, the tokens of a call are kept beside the pages, and each
of its steps reads memory for all of them (`lpo_jax.models.attention.DecodePages`).

The choice is made once for a batch, from sizes alone, so that a run and a repetition of it call alike. Tokens do not
depend on it. There are four possible numbers, so that few programs are compiled.
"""

FEWEST, MOST = 16, 128
# A response has at least so many calls, so that a slot whose row has ended soon gets another one.
CALLS_OF_RESPONSE = 16
# The share of the time that looks may take before calls are made longer.
SHARE = 0.01
# Seconds of a look, and for each row: for 64 to 1,024 rows, the scheduling took 0.1 ms + 5 us a row on one CPU core
# (`benchmarks/tail.py` replaces the device); starting a program and reading its results take about 1 ms.
LOOK, LOOK_OF_ROW = 1e-3, 5e-6
# Bytes a second by which a device is assumed to read its weights, by platform.
BANDWIDTH = {"cpu": 1e10, "gpu": 3e12, "tpu": 1.6e12}


def look_seconds(rows: int) -> float:
    """Return the seconds that the device waits between two calls with so many rows."""
    return LOOK + LOOK_OF_ROW * rows


def call_tokens(limit: int, rows: int, step_seconds: float, recent_seconds: float = 0.0) -> int:
    """Return the number of tokens of a call: a power of two from FEWEST to MOST.

    It is doubled as long as looks take more than SHARE of the time and a step gains more from fewer looks than it loses
    by reading memory for more tokens.

    Args:
      limit: the largest number of tokens of a response.
      rows: rows that are decoded at once, on all devices.
      step_seconds: of a decode step.
      recent_seconds: of a step, for each token of a call, to read the tokens of this call.
    """
    look, tokens = look_seconds(rows), FEWEST
    while 2 * tokens <= min(MOST, limit // CALLS_OF_RESPONSE):
        gained, lost = look / (2 * tokens), recent_seconds * tokens
        if look <= SHARE * tokens * step_seconds or gained <= lost:
            break
        tokens *= 2
    return tokens


def planned_call_tokens(
    limit: int, rows: int, weight_bytes: float, recent_bytes: float, platform: str
) -> int:
    """Return `call_tokens` with the times that a step is planned to take.

    Args:
      limit: as in `call_tokens`.
      rows: as in `call_tokens`.
      weight_bytes: of the weights on a device.
      recent_bytes: of the keys and values on a device of one token of each row, if they are kept beside pages; else 0.
      platform: "cpu", "gpu" or "tpu".
    """
    bandwidth = BANDWIDTH[platform]
    return call_tokens(limit, rows, weight_bytes / bandwidth, recent_bytes / bandwidth)
