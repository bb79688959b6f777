"""Ops of DeepSeek-V2, each with one signature (`api.py`) and several implementations. Depends on JAX only."""
