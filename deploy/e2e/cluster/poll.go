package cluster

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// poll asks until f succeeds or ctx ends, and says then what f said last.
func poll(ctx context.Context, what string, f func(context.Context) error) error {
	for {
		err := f(ctx)
		if err == nil {
			return nil
		}
		var stop *hopeless
		if errors.As(err, &stop) {
			return fmt.Errorf("e2e: %s: %w", what, stop.error)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("e2e: gave up waiting for %s: %w (%w)", what, err, context.Cause(ctx))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// hopeless marks an error that waiting does not cure.
type hopeless struct{ error }
