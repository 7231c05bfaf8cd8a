"""The engine, and what it trains with."""
