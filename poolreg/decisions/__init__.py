"""From measurements to decisions: trust in proxies, predictions, attribution, suggestions."""
