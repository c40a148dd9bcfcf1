//! Units, as types, so that bytes are never added to cloudlets.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Why a quantity was refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum UnitError {
    #[error("{text:?} is not a size; write a number and a unit, for example 512MiB, 4GiB or 1gb")]
    NotBytes { text: String },
    #[error("{text:?} is not a number of CPUs; write for example 1, 0.5 or 2.25")]
    NotCpus { text: String },
    #[error("{text:?} is not a rate; write a number and bit, kbit, mbit or gbit (per second), from 64kbit up: 500mbit")]
    NotRate { text: String },
    #[error("{text:?} is too large")]
    TooLarge { text: String },
}

/// A number of bytes. `k`, `m`, `g`, `t` (with or without `b`, `ib`) all count in powers of 1024, as Compose does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }
}

impl fmt::Display for Bytes {
    /// Three significant digits in the largest fitting binary unit: `1.07 GiB`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
        let mut value = self.0 as f64;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        let digits = if unit == 0 || value >= 100.0 {
            0
        } else if value >= 10.0 {
            1
        } else {
            2
        };
        f.pad(&format!("{value:.digits$} {}", UNITS[unit]))
    }
}

impl FromStr for Bytes {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let not = || UnitError::NotBytes { text: text.to_owned() };
        let trimmed = text.trim();
        let split = trimmed.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(split);
        let shift = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            _ => return Err(not()),
        };
        let number: f64 = number.parse().map_err(|_| not())?;
        let bytes = number * (1u64 << shift) as f64;
        if !(0.0..9.0e18).contains(&bytes) {
            return Err(UnitError::TooLarge { text: text.to_owned() });
        }
        Ok(Self(bytes as u64))
    }
}

/// Thousandths of one CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct MilliCpu(pub u32);

impl fmt::Display for MilliCpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{:.3}", f64::from(self.0) / 1000.0);
        f.pad(text.trim_end_matches('0').trim_end_matches('.'))
    }
}

impl FromStr for MilliCpu {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let cpus: f64 = text.trim().parse().map_err(|_| UnitError::NotCpus { text: text.to_owned() })?;
        if !(0.0..=4096.0).contains(&cpus) {
            return Err(UnitError::TooLarge { text: text.to_owned() });
        }
        Ok(Self((cpus * 1000.0).round() as u32))
    }
}

/// The slowest rate that makes sense, in bits per second.
const MIN_RATE_BITS: u64 = 64_000;

/// A rate in bits per second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BitRate(pub u64);

impl BitRate {
    pub fn bytes_per_second(self) -> f64 {
        self.0 as f64 / 8.0
    }
}

impl fmt::Display for BitRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(1_000_000_000, "gbit"), (1_000_000, "mbit"), (1_000, "kbit")];
        let (size, unit) = units.into_iter().find(|(size, _)| self.0.is_multiple_of(*size)).unwrap_or((1, "bit"));
        f.pad(&format!("{}{unit}", self.0 / size))
    }
}

impl FromStr for BitRate {
    type Err = UnitError;

    /// Reads `10gbit`, `2.5gbit`, `100mbit`, `64kbit` (powers of ten, as `tc` counts).
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let not = || UnitError::NotRate { text: text.to_owned() };
        let lower = text.trim().to_ascii_lowercase();
        let split = lower.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(lower.len());
        let (number, unit) = lower.split_at(split);
        let factor = match unit.trim() {
            "bit" => 1.0,
            "kbit" => 1e3,
            "mbit" => 1e6,
            "gbit" => 1e9,
            _ => return Err(not()),
        };
        let bits = number.parse::<f64>().map_err(|_| not())? * factor;
        if bits >= 1e15 {
            return Err(UnitError::TooLarge { text: text.to_owned() });
        }
        if bits < MIN_RATE_BITS as f64 { Err(not()) } else { Ok(Self(bits as u64)) }
    }
}

/// The unit in which resources are given and counted: 128 MiB of memory and 400 MHz of CPU each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct Cloudlets(pub u32);

impl Cloudlets {
    pub const MEMORY_BYTES: u64 = 128 << 20;
    pub const CPU_MHZ: u32 = 400;

    pub fn memory(self) -> Bytes {
        Bytes(u64::from(self.0) * Self::MEMORY_BYTES)
    }

    /// The CPU share on a host whose cores run at `base_mhz`, in thousandths of a core.
    pub fn cpu(self, base_mhz: u32) -> MilliCpu {
        let mhz = u64::from(self.0) * u64::from(Self::CPU_MHZ);
        MilliCpu((mhz * 1000 / u64::from(base_mhz.max(1))).min(u64::from(u32::MAX)) as u32)
    }

    /// How many cloudlets this much memory and CPU (at `base_mhz`) take up: the larger of both, rounded up.
    pub fn covering(memory: Bytes, cpu: MilliCpu, base_mhz: u32) -> Self {
        let by_memory = memory.0.div_ceil(Self::MEMORY_BYTES);
        let by_cpu = (u64::from(cpu.0) * u64::from(base_mhz)).div_ceil(u64::from(Self::CPU_MHZ) * 1000);
        Self(by_memory.max(by_cpu).min(u64::from(u32::MAX)) as u32)
    }
}

impl fmt::Display for Cloudlets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_as_compose_writes_them() {
        for (text, bytes) in [("512m", 512 << 20), ("1gb", 1 << 30), ("0.5GiB", 1 << 29), ("42", 42), ("3 KiB", 3072)] {
            assert_eq!(text.parse::<Bytes>().unwrap().0, bytes, "{text}");
        }
        for bad in ["", "m", "1x", "-1m", "1e9g"] {
            assert!(bad.parse::<Bytes>().is_err(), "{bad}");
        }
        assert_eq!(Bytes(1_149_000_000).to_string(), "1.07 GiB");
    }

    #[test]
    fn rates_parse_as_tc_writes_them() {
        for (text, bits) in [("10gbit", 10_000_000_000), ("2.5gbit", 2_500_000_000), ("64Kbit", 64_000)] {
            assert_eq!(text.parse::<BitRate>().unwrap().0, bits, "{text}");
        }
        for bad in ["", "gbit", "10", "1kbit", "-1gbit", "10 apples", "1000000gbit"] {
            assert!(bad.parse::<BitRate>().is_err(), "{bad}");
        }
        assert_eq!(BitRate(2_500_000_000).to_string(), "2500mbit");
    }

    #[test]
    fn cloudlets_cover_the_larger_need() {
        assert_eq!(Cloudlets::covering(Bytes::mib(129), MilliCpu(0), 2000), Cloudlets(2));
        assert_eq!(Cloudlets::covering(Bytes::mib(1), MilliCpu(1000), 2000), Cloudlets(5));
        assert_eq!(Cloudlets(5).cpu(2000), MilliCpu(1000));
    }
}
