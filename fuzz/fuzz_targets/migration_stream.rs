//! The bytes of a migration stream: frames, and what is in those with a form.
#![no_main]

use godwit_migrate::files::Entry;
use godwit_migrate::wire::{Accept, Final, FrameReader, Frozen, Image, Kind, Offer, Refuse, RoundEnd, negotiate};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let mut reader = FrameReader::new(bytes);
        while let Ok(frame) = reader.next().await {
            match frame.kind {
                Kind::Offer => drop(frame.json::<Offer>().map(|offer| negotiate(&offer))),
                Kind::Accept => drop(frame.json::<Accept>()),
                Kind::Refuse => drop(frame.json::<Refuse>()),
                Kind::Entry => drop(frame.json::<Entry>()),
                Kind::RoundEnd => drop(frame.json::<RoundEnd>()),
                Kind::Frozen => drop(frame.json::<Frozen>()),
                Kind::Image => drop(frame.json::<Image>()),
                Kind::Final => drop(frame.json::<Final>()),
                _ => {}
            }
        }
    });
});
