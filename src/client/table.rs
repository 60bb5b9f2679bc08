//! Left-aligned columns, as crictl and kubectl print them.
/// A table with a header; columns are as wide as their widest cell.
#[derive(Debug, Clone, Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

/// Blanks between columns.
const GAP: usize = 3;

impl Table {
    /// A table with these column names.
    pub fn new(header: &[&str]) -> Table {
        Table {
            rows: vec![header.iter().map(|&h| h.to_owned()).collect()],
        }
    }

    /// Adds a row. Control characters in cells (names come from others) become blanks.
    pub fn row<I: IntoIterator<Item = String>>(&mut self, cells: I) {
        let clean = |cell: String| cell.replace(char::is_control, " ");
        self.rows.push(cells.into_iter().map(clean).collect());
    }

    /// The table as text, each line ended by a newline and free of trailing blanks.
    pub fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let mut widths = vec![0; columns];
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(cell);
                let blanks = width - cell.chars().count() + GAP;
                line.extend(std::iter::repeat_n(' ', blanks));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// The first 13 characters of an id, without the digest's algorithm: what crictl shows.
pub fn short_id(id: &str) -> String {
    let id = id.split_once(':').map_or(id, |(_, hex)| hex);
    id.chars().take(13).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_lines_end_clean() {
        let mut table = Table::new(&["ID", "NAME", "STATE"]);
        table.row(["1".to_owned(), "a long name".to_owned(), "Ready".to_owned()]);
        table.row(["22".to_owned(), "ä\n".to_owned(), String::new()]);
        assert_eq!(
            table.render(),
            "ID   NAME          STATE\n\
             1    a long name   Ready\n\
             22   ä\n"
        );
    }

    #[test]
    fn ids_are_cut() {
        assert_eq!(short_id("sha256:0123456789abcdef"), "0123456789abc");
        assert_eq!(short_id("0123456789abcdef"), "0123456789abc");
        assert_eq!(short_id("short"), "short");
    }
}
