package cluster

import (
	"encoding/json"
	"fmt"
	"os"
	"testing"
)

// outerVar makes this program the outer process of a run, prepared as it says.
const outerVar = "ZTUN_E2E_TEST_OUTER"

func TestMain(m *testing.M) {
	if p, inside := Role(); inside {
		exit(1, aRun(p))
	}
	if text := os.Getenv(outerVar); text != "" {
		var p Prepared
		if err := json.Unmarshal([]byte(text), &p); err != nil {
			exit(1, err)
		}
		exit(Enclose(p))
	}
	os.Exit(m.Run())
}

func exit(code int, err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}
