use crate::lab::is_root; #[test] fn x() { is_root(); }
