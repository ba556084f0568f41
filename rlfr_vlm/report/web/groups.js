// Names of runs that are one at several seeds.

/**
 * What the names share, and how many there are; all of them where they share nothing.
 * @param {string[]} names
 */
export function groupName(names) {
  if (names.length === 1) return names[0];
  let shared = names[0];
  while (!names.every((name) => name.startsWith(shared))) shared = shared.slice(0, -1);
  shared = shared.replace(/[-_./ ]*(seed|s)?[-_./ =]*$/, "");
  return shared.length >= 2 ? `${shared}, ${names.length} seeds` : names.join(", ");
}
