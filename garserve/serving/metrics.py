"""garserve's own numbers beside vLLM's, on /metrics."""

from prometheus_client import Counter, Gauge, Histogram

regions = Counter("garserve:regions", "Regions that were asked about.", ["endpoint"])
rejected = Counter("garserve:rejected", "Requests that were refused before any work.", ["reason"])
disconnected = Counter("garserve:disconnected", "Requests whose client went away before the end.")
requests = Gauge("garserve:requests", "Requests in work or waiting.", multiprocess_mode="livesum")
waiting = Gauge("garserve:queue", "Preparations in work or waiting for a thread.", multiprocess_mode="livesum")
preprocess_seconds = Histogram(
    "garserve:preprocess_seconds",
    "Seconds of decoding, drawing and tiling, a step at a time.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
# Read from the engine, which counts from its start: gauges, because a process of several must not add them up.
tiles_requested = Gauge("garserve:tiles_requested", "Tiles that requests needed.", multiprocess_mode="max")
tiles_computed = Gauge("garserve:tiles_computed", "Tiles that went through the tower.", multiprocess_mode="max")
tiles_reused = Gauge("garserve:tiles_reused", "Tiles that were found computed.", multiprocess_mode="max")
