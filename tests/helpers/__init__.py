"""What several test modules share: ranks, cases, the reference implementation."""
