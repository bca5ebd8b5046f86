// Package table is what a run of cases says at its end: which claim was tried,
// how it went, how long it took, and what was left out.
package table

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
)

// Result is how a case went.
type Result string

const (
	OK      Result = "ok"
	Failed  Result = "FAILED"
	Skipped Result = "skipped"
)

// A Row is one case.
type Row struct {
	Test, Claim string
	Result      Result
	Took        time.Duration
}

// A Table collects rows, from any goroutine.
type Table struct {
	mu   sync.Mutex
	rows []Row
}

// Add adds a case that ended.
func (t *Table) Add(r Row) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rows = append(t.rows, r)
}

// Print writes the table, and how long all of it took.
func (t *Table) Print(out io.Writer, took time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\nresult\ttime\tcase\tclaim")
	for _, r := range t.rows {
		fmt.Fprintf(w, "%s\t%.1f s\t%s\t%s\n", r.Result, r.Took.Seconds(), strings.TrimPrefix(r.Test, "Test"), r.Claim)
	}
	fmt.Fprintf(w, "total\t%.1f s\t%d cases\n", took.Seconds(), len(t.rows))
	w.Flush()
}

// Incomplete says which of the wanted tests did not run, nor a part of them,
// and in CI which were skipped: a claim that nobody tried must not look like one that held.
func (t *Table) Incomplete(wanted []string, ci bool) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(wanted) == 0 {
		return errors.New("e2e: no case has such a name")
	}
	var errs []error
	for _, name := range wanted {
		rows := slices.DeleteFunc(slices.Clone(t.rows), func(r Row) bool { return r.Test != name && !strings.HasPrefix(r.Test, name+"/") })
		if len(rows) == 0 {
			errs = append(errs, fmt.Errorf("e2e: %s did not run, or makes no claim", name))
		}
		for _, r := range rows {
			if ci && r.Result == Skipped {
				errs = append(errs, fmt.Errorf("e2e: %s was skipped, which CI=true does not allow", r.Test))
			}
		}
	}
	return errors.Join(errs...)
}
