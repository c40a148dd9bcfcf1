//! Texts that mean something: durations, command lines, names that resemble each other.

/// Milliseconds of a Compose duration: `1m30s`, `500ms`, `1.5h`. `None`: not a duration, or too long.
pub(super) fn duration_ms(text: &str) -> Option<u64> {
    let mut rest = text.trim();
    if rest.is_empty() {
        return None;
    }
    let mut us = 0.0_f64;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !(c.is_ascii_digit() || c == '.')).filter(|n| *n > 0)?;
        let (number, tail) = rest.split_at(digits);
        let letters = tail.find(|c: char| !c.is_alphabetic()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(letters);
        let unit_us = match unit {
            "us" | "µs" => 1.0,
            "ms" => 1e3,
            "s" => 1e6,
            "m" => 60e6,
            "h" => 3600e6,
            _ => return None,
        };
        us += number.parse::<f64>().ok()? * unit_us;
        rest = tail;
    }
    // A hundred years bound the arithmetic of those who add to it.
    let ms = (us / 1e3).round();
    (ms <= 100.0 * 366.0 * 86_400e3).then_some(ms as u64)
}

/// The words of a command line as a shell would split it, with quotes and backslashes, but without
/// variables, globs or operators. `None`: a quote is not closed.
pub(super) fn words(line: &str) -> Option<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            c if c.is_whitespace() => words.extend(word.take()),
            '\'' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next()? {
                        '\'' => break,
                        c => word.push(c),
                    }
                }
            }
            '"' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next()? {
                        '"' => break,
                        '\\' => match chars.next()? {
                            c @ ('"' | '\\' | '$' | '`') => word.push(c),
                            '\n' => {}
                            c => word.extend(['\\', c]),
                        },
                        c => word.push(c),
                    }
                }
            }
            '\\' => word.get_or_insert_default().push(chars.next()?),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    Some(words)
}

/// The candidate that `name` was probably meant to be.
pub(super) fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let most = (name.chars().count() / 3).max(1);
    // A key may also have been put together differently: memLimit, mem-limit.
    let plain = |s: &str| s.replace(['-', '_'], "").to_lowercase();
    candidates
        .map(|c| (if plain(c) == plain(name) { 0 } else { distance(name, c) }, c))
        .filter(|(distance, _)| *distance <= most)
        .min()
        .map(|(_, candidate)| candidate)
}

/// Edits (insert, delete, replace, swap neighbours) from `a` to `b`: optimal string alignment.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().take(64).collect(), b.chars().take(64).collect());
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i; b.len() + 1];
        for j in 1..=b.len() {
            let replace = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            row[j] = replace.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                row[j] = row[j].min(rows[i - 2][j - 2] + 1);
            }
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        for (text, ms) in
            [("1m30s", 90_000), ("500ms", 500), ("1.5h", 5_400_000), ("0s", 0), ("2000us", 2), ("1h0m1s", 3_601_000)]
        {
            assert_eq!(duration_ms(text), Some(ms), "{text}");
        }
        for bad in ["", "10", "s", "1x", "1m 30s", "-1s", "1.2.3s", "1e9s", "9999999999h"] {
            assert_eq!(duration_ms(bad), None, "{bad}");
        }
    }

    #[test]
    fn words_split_like_a_shell() {
        let cases: [(&str, &[&str]); 5] = [
            ("redis-server --save ''", &["redis-server", "--save", ""]),
            ("sh -c \"echo \\\"a b\\\" '$x'\"", &["sh", "-c", "echo \"a b\" '$x'"]),
            ("  a\\ b\tc'd'e\n", &["a b", "cde"]),
            ("'it'\\''s'", &["it's"]),
            ("", &[]),
        ];
        for (line, expected) in cases {
            let expected: Vec<String> = expected.iter().map(|word| (*word).to_owned()).collect();
            assert_eq!(words(line), Some(expected), "{line}");
        }
        for bad in ["'", "\"a", "a\\"] {
            assert_eq!(words(bad), None);
        }
    }

    #[test]
    fn typing_errors_find_their_key() {
        let keys = ["image", "environment", "mem_limit", "ports", "cpus"];
        for (typo, key) in
            [("imgae", "image"), ("enviroment", "environment"), ("memLimit", "mem_limit"), ("port", "ports")]
        {
            assert_eq!(nearest(typo, keys.into_iter()), Some(key));
        }
        assert_eq!(nearest("zzz", keys.into_iter()), None);
    }
}
