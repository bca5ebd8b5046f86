package table

import (
	"strings"
	"testing"
	"time"
)

func TestPrint(t *testing.T) {
	var table Table
	table.Add(Row{"TestOne", "one holds", OK, 1500 * time.Millisecond})
	table.Add(Row{"TestOther", "another does", Failed, time.Minute})
	var out strings.Builder
	table.Print(&out, 62*time.Second)
	want := `
result  time    case   claim
ok      1.5 s   One    one holds
FAILED  60.0 s  Other  another does
total   62.0 s  2 cases
`
	if out.String() != want {
		t.Errorf("printed\n%swant\n%s", out.String(), want)
	}
}

func TestIncomplete(t *testing.T) {
	var table Table
	table.Add(Row{Test: "TestRan", Result: Failed})
	table.Add(Row{Test: "TestSkipped", Result: Skipped})
	table.Add(Row{Test: "TestParts/One", Result: OK})
	table.Add(Row{Test: "TestParts/Other", Result: Skipped})
	for _, c := range []struct {
		wanted []string
		ci     bool
		says   string // empty for no error
	}{
		{nil, false, "no case has such a name"},
		{[]string{"TestRan", "TestSkipped"}, false, ""},
		{[]string{"TestRan"}, true, ""},
		{[]string{"TestRan", "TestSkipped"}, true, "TestSkipped was skipped"},
		{[]string{"TestParts"}, false, ""},
		{[]string{"TestParts"}, true, "TestParts/Other was skipped"},
		{[]string{"TestPart"}, false, "TestPart did not run"},
		{[]string{"TestRan", "TestMissing"}, false, "TestMissing did not run"},
	} {
		err := table.Incomplete(c.wanted, c.ci)
		if c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("Incomplete(%v, %t) = %v, want %q", c.wanted, c.ci, err, c.says)
		}
	}
}
