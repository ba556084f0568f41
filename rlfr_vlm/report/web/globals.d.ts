// What other scripts of a page bring along.

/** Of plotly.js, which stands before ours. */
declare const Plotly: {
  react(element: object, traces: object[], layout: object, config: object): void;
  relayout(element: object, change: object): void;
};

/** Written before live.js by the server. */
declare const PAGE_STAMP: string;
declare const LOOK_MS: number;
