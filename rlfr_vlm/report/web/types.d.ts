// Types of the page's own: what is drawn, and what the data become once they are unpacked.

import type {
  AttentionData,
  BandColumns,
  ComparedColumns,
  ComparedData,
  Columns,
  Estimate,
  Flip,
  GroupData,
  GroupHead,
  PooledColumns,
  PooledPoint,
  ProblemData,
  ResponseHead,
  ResponseTokens,
  SampleData,
  TokenRow,
  TokenWindow,
  VersusData,
} from "./data";

interface Found {
  querySelector(selector: string): Part | null;
  querySelectorAll(selector: string): NodeListOf<Part>;
  closest(selector: string): Part | null;
  on(event: string, listener: (change: Relayout) => void): void; // of Plotly
  restLooking(): void; // of a card with attention
}

/** An element of the page, of whichever kind: which one an id names, its view knows. */
export type Part = Found &
  HTMLInputElement &
  HTMLCanvasElement &
  HTMLDialogElement &
  HTMLImageElement;

export type PageEvent = MouseEvent & KeyboardEvent & { target: Part; currentTarget: Part };

export type Child = Node | string | number | false | null | undefined | Child[];

export type Attributes = {
  [name: string]: string | number | boolean | null | undefined | ((event: PageEvent) => unknown);
};

/** Of a table: title, class, and what stands in a row's cell. */
export type Column<Row> = [string, string, (row: Row) => Child];

// Charts.

export type Range = [number, number];
export type Relayout = Record<string, any>;
export type Trace = { x: (number | null)[]; [name: string]: any };

export interface Chart {
  title: string;
  unit?: string;
  percent?: boolean;
}

export interface Section<C extends Chart> {
  title: string;
  charts: C[];
}

/** What the grid of charts asks of its page. */
export interface Charts<C extends Chart> {
  height: number;
  traces(chart: C, smoothing: number): Trace[];
  layout(chart: C, height: number): Record<string, any>;
  aside(chart: C): Child; // beside the title
  key?(chart: C): Child; // below it
  follows?(chart: C): boolean; // whether it is zoomed with the others; all are, if left out
  zoomed?(range: Range | null): void;
}

export type Queue<C extends Chart> = [Part, C][];

export interface RunChart extends Chart {
  lines: [string, string][]; // metric, label
  source?: "flowFit" | "latents";
  evaluations?: boolean;
  fromZero?: boolean;
  level?: number | (() => number | null);
  reading?: string;
}

export interface ComparedChart extends Chart {
  key?: string; // metric
  evaluation?: "accuracy" | "greedy";
}

/** How steps or hours lie along an axis. */
export interface Clock {
  axis: "steps" | "hours";
  scale: number;
}

export interface Points {
  x: number[];
  y: number[];
  low: number[] | null; // no interval
  high: number[] | null;
}

// Rollouts.

export interface Response extends ResponseHead {
  searchable?: string;
}

export interface Group extends GroupHead {
  responses: Response[];
  at: number; // place among its step's tokens
  right: number;
  searchable?: string;
}

export interface GroupMatch {
  group: Group;
  shown: number[]; // places of the responses that pass
}

export interface RolloutSettings {
  step: string; // all, or a number
  responses: string;
  groups: string;
  search: string;
  shade: Quantity | "";
  attention: string;
}

export type Quantity = "flow_rewards" | "deviations" | "logprobs" | "advantages" | "entropy";

// Latents.

export interface Frame {
  first: number; // step
  last: number;
  points: number[];
  sums: [number, number, number][]; // of right and of wrong answers: number, x, y
}

// Runs beside each other.

export interface SeedGroup extends GroupData {
  at: number;
  name: string;
  hue: string;
  dash: string;
  pooled: boolean;
}

export interface RunRow {
  kind: string;
  group: SeedGroup;
  run?: ComparedData;
  number?: number;
}

// Evaluations.

export type Facet = "benchmark" | "verdict" | "only" | "source";

export interface Sample extends SampleData {
  disagreement: boolean;
  traits: string[];
  searchable?: string;
}

export interface EvaluatedProblem extends ProblemData {
  samples: Sample[];
  right: number;
  counted: number;
  searchable?: string;
}

export interface FacetRule {
  of(sample: Sample, problem: EvaluatedProblem): string[];
  every?: boolean; // it takes all of the chosen values
}

/** Which of two problems comes first. */
export type Order = (a: EvaluatedProblem, b: EvaluatedProblem) => number;

export type Facets = Record<Facet, FacetRule>;
export type Chosen = Record<Facet, Set<string>>;
export type Tallies = Record<Facet, Map<string, number>>;

export interface ProblemMatch {
  problem: EvaluatedProblem;
  shown: number[]; // places of the samples that pass
}

/** Part of a text that is marked. */
export interface Marked {
  kind: string;
  from: number;
  to: number;
}
