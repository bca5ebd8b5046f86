package podnet

import "testing"

func TestFreeTellsWhetherTheDeviceHasAReader(t *testing.T) {
	e := newEnv(t)
	e.attach(Config{})
	if free, err := e.a.Free(); free || err != nil {
		t.Errorf("with a reader: %v, %v", free, err)
	}
	e.dev.close()
	if free, err := e.a.Free(); !free || err != nil {
		t.Errorf("without: %v, %v", free, err)
	}
	if err := e.a.Verify(t.Context()); err != nil {
		t.Errorf("asking changed the pod: %v", err)
	}
}
