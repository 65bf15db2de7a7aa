/** A small chart over time. uPlot is loaded with the first one. */
import { useEffect, useRef } from "preact/hooks";
import { addStyle, html } from "./ui.js";

/** The shortest time that is shown, so that the first points don't stretch. */
const SPAN_S = 60;

let library = null;
const loaded = () => (library ??= Promise.all([import("uplot"), addStyle("vendor/uplot.css")]).then(([module]) => module.default));

const colour = (name) => {
  // A canvas knows no light-dark(): let the browser resolve it.
  const probe = document.createElement("span");
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
};

/**
 * @param {{rows: number[][], version: any, series: [string, string][], unit: string, max?: number, least?: number, label: string,
 *   show?: (value: number) => string}} options
 *   `rows`: time in seconds, then one value for each of the series; `version` changes when `rows` has; `least`: the
 *   smallest value at the top of the scale
 */
export function Chart({ rows, version, series, unit = "", max, least = 1, label, show = (value) => `${value.toFixed(value < 10 ? 1 : 0)} ${unit}` }) {
  const box = useRef(null);
  const plot = useRef(null);
  // The library may come after rows that were not there at the first rendering.
  const shown = useRef(rows);
  shown.current = rows;
  const columns = () => series.reduce((found, _, at) => [...found, shown.current.map((row) => row[at + 1])], [shown.current.map((row) => row[0])]);
  const build = async () => {
    const UPlot = await loaded();
    if (!box.current) return;
    plot.current?.destroy();
    const quiet = colour("quiet");
    const line = colour("line");
    const axis = { stroke: quiet, grid: { stroke: line, width: 1 }, ticks: { show: false }, font: "11px system-ui", gap: 4 };
    plot.current = new UPlot({
      width: box.current.clientWidth, height: box.current.clientHeight, legend: { show: false }, cursor: { show: false },
      padding: [6, 6, 0, 0],
      scales: {
        x: { range: (_, first, last = null) => (last === null ? [Date.now() / 1000 - SPAN_S, Date.now() / 1000] : [Math.min(first, last - SPAN_S), last]) },
        y: { range: (_, low, high) => [0, max ?? Math.max(high * 1.15, least)] },
      },
      axes: [{ ...axis, size: 22, space: 70, values: "{HH}:{mm}:{ss}" }, { ...axis, size: 58, space: 28, values: (_, ticks) => ticks.map(show) }],
      series: [{}, ...series.map(([name, of]) => ({ label: name, stroke: colour(of), width: 1.5, points: { show: false } }))],
    }, columns(), box.current);
  };
  useEffect(() => {
    build();
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    scheme.addEventListener("change", build);
    const sizes = new ResizeObserver(() => {
      if (plot.current && box.current) plot.current.setSize({ width: box.current.clientWidth, height: box.current.clientHeight });
    });
    sizes.observe(box.current);
    return () => { scheme.removeEventListener("change", build); sizes.disconnect(); plot.current?.destroy(); plot.current = null; };
  }, []);
  useEffect(() => { plot.current?.setData(columns()); }, [version]);
  const last = rows.at(-1);
  return html`<div class="row" style="gap: 14px; margin-bottom: 4px">${series.map(([name, of], at) => html`<span class="row" style="gap: 6px">
      <svg width="10" height="3" aria-hidden="true"><rect width="10" height="3" rx="1" style=${`fill: var(--${of})`}/></svg>
      <span class="quiet">${name}</span> <span class="num">${last && last[at + 1] !== null ? show(last[at + 1]) : "–"}</span></span>`)}</div>
    <div class="chart" ref=${box} role="img" aria-label=${label}></div>`;
}
