"""Who am I, who are the others: launch discovery, process groups, errors shared between ranks."""
