"""`splitfx.plan`: which passes, and their compositions, bring a model below what its user has."""
