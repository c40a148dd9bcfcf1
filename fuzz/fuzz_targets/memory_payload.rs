//! The payload of a frame of memory: whose pages, which ranges, and their content.
#![no_main]

use godwit_migrate::pages::{Head, with_pages};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok((_, ranges, content)) = Head::split(bytes) {
        let _ = with_pages(&ranges, content);
    }
});
