"""Picture and text records: reading, checking and storing them, and handing them to models."""
