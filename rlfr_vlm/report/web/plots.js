// How every chart looks.

import { css } from "./dom.js";

function plotAxis() {
  return {
    gridcolor: css("--line"),
    zeroline: false,
    linecolor: css("--line"),
    tickfont: { size: 11 },
  };
}

/**
 * @param {number} height
 * @param {{ l: number, r: number, t: number, b: number }} margin
 * @param {Record<string, unknown>} xaxis
 * @param {Record<string, unknown>} yaxis
 * @returns {Record<string, any>}
 */
export function plotLayout(height, margin, xaxis, yaxis) {
  return {
    height,
    margin,
    showlegend: false,
    hovermode: "x unified",
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: css("--sans"), size: 12, color: css("--muted") },
    hoverlabel: {
      bgcolor: css("--card"),
      bordercolor: css("--line"),
      font: { color: css("--ink"), size: 12 },
      namelength: -1,
    },
    xaxis: {
      ...plotAxis(),
      showgrid: false,
      ticks: "outside",
      ticklen: 3,
      tickcolor: css("--line"),
      spikecolor: css("--muted"),
      spikethickness: 1,
      spikedash: "dot",
      ...xaxis,
    },
    yaxis: { ...plotAxis(), exponentformat: "e", nticks: 5, ...yaxis },
  };
}
