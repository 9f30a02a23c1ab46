//! The figures of a benchmark as a picture (SVG).
//!
//! ```text
//!   ratios to the yardstick, one row each:   o  o oo|ooo o      a ring a pair, a bar from the low to
//!   1.0 is as fast as it                      ======|===        the high end of the 90 % interval,
//!                                                   |           a mark at the median
//! ```
//!
//! Left to others: every number (they are in the JSON); what has no yardstick is not drawn.

use super::{Outcome, Row};
use plotters::coord::Shift;
use plotters::prelude::*;
use std::path::Path;

/// Size of the picture, and the height of a row.
const WIDTH: u32 = 960;
const ROW_HEIGHT: u32 = 56;
const HEAD_HEIGHT: u32 = 90;
/// What the picture shows at least: so that two pictures of a sound store look alike.
const RATIO_MIN: f64 = 0.7;
const RATIO_MAX: f64 = 1.3;

/// Draws every ratio; nothing is written when there is none.
///
/// # Errors
/// In words, when the file cannot be written.
pub(crate) fn draw(found: &Outcome, path: &Path) -> Result<(), String> {
    let ratios: Vec<&Row> = found
        .rows
        .iter()
        .filter(|row| row.name.contains("_vs_"))
        .collect();
    if ratios.is_empty() {
        return Err("this benchmark has no ratios to draw".to_owned());
    }
    let height = HEAD_HEIGHT + ROW_HEIGHT * ratios.len() as u32;
    let picture = SVGBackend::new(path, (WIDTH, height)).into_drawing_area();
    fill(&picture, &ratios, found.idle_cpu)
        .map_err(|error| format!("cannot draw {}: {error}", path.display()))
}

type Drawing<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn fill(
    picture: &Drawing<'_>,
    ratios: &[&Row],
    idle_cpu: f64,
) -> Result<(), Box<dyn std::error::Error>> {
    picture.fill(&WHITE)?;
    let all = || ratios.iter().flat_map(|row| row.values.iter().copied());
    let low = all().fold(RATIO_MIN, f64::min);
    let high = all().fold(RATIO_MAX, f64::max);
    let pad = (high - low) * 0.02;
    let rows = ratios.len();
    let title = format!(
        "kvar to its yardstick, {} pairs, idle CPU at least {:.0} %",
        ratios.iter().map(|row| row.values.len()).max().unwrap_or(0),
        idle_cpu * 100.0
    );
    let mut chart = ChartBuilder::on(picture)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(30)
        .y_label_area_size(250)
        .build_cartesian_2d(low - pad..high + pad, 0.0..rows as f64)?;
    // Rows are named from the top down, and labels stand where rows do.
    let name = |at: &f64| {
        let row = rows.checked_sub(1 + at.floor() as usize);
        row.and_then(|row| ratios.get(row))
            .map_or_else(String::new, |row| row.name.to_owned())
    };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .y_labels(0)
        .x_labels(9)
        .x_label_formatter(&|ratio| format!("{ratio:.2}"))
        .draw()?;
    chart.draw_series(LineSeries::new(
        [(1.0, 0.0), (1.0, rows as f64)],
        BLACK.mix(0.6),
    ))?;
    for (number, row) in ratios.iter().enumerate() {
        let at = (rows - 1 - number) as f64 + 0.5;
        let bar = [(row.ratio.low, at - 0.16), (row.ratio.high, at + 0.16)];
        chart.draw_series([Rectangle::new(bar, BLUE.mix(0.25).filled())])?;
        let mark = [(row.ratio.median, at - 0.28), (row.ratio.median, at + 0.28)];
        chart.draw_series(LineSeries::new(mark, BLUE.stroke_width(3)))?;
        chart.draw_series(
            row.values
                .iter()
                .map(|ratio| Circle::new((*ratio, at), 3, BLACK.mix(0.5))),
        )?;
        let (left, top) = chart.backend_coord(&(low - pad, at));
        let text = format!("{}  {:.3}", name(&at), row.ratio.median);
        picture.draw(&Text::new(
            text,
            (left - 250 + 12, top - 7),
            ("sans-serif", 16),
        ))?;
    }
    picture.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ratio_is_drawn_with_its_pairs_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plot.svg");
        let rows = vec![
            Row::of("read_64k_qd16_vs_fio", vec![0.97, 1.01, 0.99], ""),
            Row::of("append_vs_fio", vec![0.5, 0.7], ""),
            Row::of("read_cpu_us", vec![5.0, 6.0], ""),
        ];
        draw(&Outcome::new(rows, &[0.9]), &path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("<svg") && text.trim_end().ends_with("</svg>"));
        assert!(text.contains("read_64k_qd16_vs_fio") && text.contains("append_vs_fio"));
        assert!(!text.contains("read_cpu_us"));
        assert_eq!(text.matches("<circle").count(), 5);
    }

    #[test]
    fn without_ratios_or_a_place_to_write_it_says_so() {
        let rows = vec![Row::of("read_cpu_us", vec![5.0], "")];
        let nothing = draw(&Outcome::new(rows, &[]), Path::new("/nowhere/plot.svg"));
        assert_eq!(nothing.unwrap_err(), "this benchmark has no ratios to draw");
        let rows = vec![Row::of("append_vs_fio", vec![0.5], "")];
        let error = draw(&Outcome::new(rows, &[]), Path::new("/nowhere/plot.svg")).unwrap_err();
        assert!(error.contains("/nowhere/plot.svg"), "{error}");
    }
}
