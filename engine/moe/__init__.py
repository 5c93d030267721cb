"""The Mixture-of-Experts layer. Reading order: layer, router, capacity/, dispatch/, experts."""
