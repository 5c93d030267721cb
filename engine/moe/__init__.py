"""The Mixture-of-Experts layer. Reading order: layer, router, plan, dispatcher, experts."""
