//! Compose files as environments.
