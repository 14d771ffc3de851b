"""Commands that export models for deployment, and measure how fast they run."""
