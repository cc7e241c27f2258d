//! The results, as tables, JSON and plots.

use std::fs;
use std::path::PathBuf;

use plotters::prelude::*;
use serde_json::{Value, json};

use crate::side::Side;
use crate::{Options, machine};

/// The samples of both sides.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    contrib: Vec<f64>,
    ours: Vec<f64>,
}

impl Samples {
    pub fn add(&mut self, side: Side, sample: f64) {
        match side {
            Side::Contrib => self.contrib.push(sample),
            Side::Ours => self.ours.push(sample),
        }
    }
}

impl Samples {
    /// The median of ours.
    pub fn ours(&self) -> f64 {
        median(&self.ours)
    }
}

/// The median of the samples that are numbers: a run without transactions has no latency.
pub fn median(samples: &[f64]) -> f64 {
    let mut sorted: Vec<f64> = samples.iter().copied().filter(|s| !s.is_nan()).collect();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => sorted[length / 2],
        length => (sorted[length / 2 - 1] + sorted[length / 2]) / 2.0,
    }
}

fn range(samples: &[f64]) -> (f64, f64) {
    let least = samples.iter().copied().fold(f64::INFINITY, f64::min);
    let most = samples.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    (least, most)
}

/// One named line of a plot: points of (x, y).
pub type Curve = (String, Vec<(f64, f64)>);

pub struct Report {
    out: PathBuf,
    lines: Vec<String>,
    results: Vec<Value>,
}

impl Report {
    pub fn new(options: &Options) -> Self {
        fs::create_dir_all(&options.out).expect("cannot create the directory for results");
        let postgres = Side::Ours.installation().major();
        let read_ahead = machine::set_read_ahead();
        let title = format!(
            "PostgreSQL {postgres}; {}; read-ahead {read_ahead}; {} runs, medians",
            machine::describe(),
            options.runs
        );
        println!("{title}");
        Self {
            out: options.out.clone(),
            lines: vec![format!("# {title}"), String::new(), HEAD.to_owned()],
            results: vec![json!({ "machine": title })],
        }
    }

    /// Reports the samples of both sides. Lower is better.
    pub fn compare(&mut self, what: &str, unit: &str, samples: &Samples) {
        let ratio = median(&samples.contrib) / median(&samples.ours);
        self.compare_by(ratio, what, unit, samples);
    }

    /// Reports the samples of both sides. Higher is better.
    pub fn compare_rates(&mut self, what: &str, unit: &str, samples: &Samples) {
        let ratio = median(&samples.ours) / median(&samples.contrib);
        self.compare_by(ratio, what, unit, samples);
    }

    fn compare_by(&mut self, ratio: f64, what: &str, unit: &str, samples: &Samples) {
        let [contrib, ours] = [&samples.contrib, &samples.ours];
        let [(contrib_least, contrib_most), (ours_least, ours_most)] =
            [range(contrib), range(ours)];
        self.line(format!(
            "| {what} | {:.3} {unit} ({contrib_least:.3} to {contrib_most:.3}) \
             | {:.3} {unit} ({ours_least:.3} to {ours_most:.3}) | {ratio:.2} |",
            median(contrib),
            median(ours),
        ));
        self.results.push(json!({
            "what": what, "unit": unit, "contrib": contrib, "ours": ours, "ratio": ratio
        }));
    }

    /// Reports a single figure.
    pub fn figure(&mut self, what: &str, value: f64, unit: &str) {
        self.line(format!("| {what} | | {value:.3} {unit} | |"));
        self.results
            .push(json!({ "what": what, "unit": unit, "value": value }));
    }

    /// Draws curves into a file of that name.
    pub fn plot(&mut self, name: &str, title: &str, x: &str, y: &str, curves: &[Curve]) {
        let path = self.out.join(format!("{name}.svg"));
        let most = |pick: fn(&(f64, f64)) -> f64| {
            curves
                .iter()
                .flat_map(|(_, points)| points.iter().map(pick))
                .fold(0.0, f64::max)
        };
        let (width, height) = (most(|point| point.0), most(|point| point.1) * 1.05);
        let area = SVGBackend::new(&path, (900, 480)).into_drawing_area();
        area.fill(&WHITE).unwrap();
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 22))
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(72)
            .build_cartesian_2d(0.0..width, 0.0..height)
            .unwrap();
        chart.configure_mesh().x_desc(x).y_desc(y).draw().unwrap();
        for (index, (label, points)) in curves.iter().enumerate() {
            let color = Palette99::pick(index).stroke_width(2);
            chart
                .draw_series(LineSeries::new(points.iter().copied(), color))
                .unwrap()
                .label(label)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color));
        }
        chart
            .configure_series_labels()
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK)
            .draw()
            .unwrap();
        area.present().unwrap();
        self.results.push(json!({ "plot": name, "curves": curves }));
    }

    fn line(&mut self, line: String) {
        println!("{line}");
        self.lines.push(line);
    }

    /// Writes the files.
    pub fn finish(self) {
        let json = serde_json::to_string_pretty(&self.results).unwrap();
        fs::write(self.out.join("results.json"), json).unwrap();
        fs::write(self.out.join("results.md"), self.lines.join("\n") + "\n").unwrap();
        println!("written to {}", self.out.display());
    }
}

const HEAD: &str = "| | contrib | ours | ratio |\n| --- | --- | --- | --- |";
