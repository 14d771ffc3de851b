"""`Encoder` as the components of other libraries; each module needs its library, and is imported where it is used.

pandas, polars, `datasets` and asyncio need none: a plain call does, see `docs/encoder.md`.
"""
